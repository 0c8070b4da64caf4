"""`python -m abft_fast`, for launchers that take a module."""

from abft_fast.cli import main

if __name__ == "__main__":
    main()
