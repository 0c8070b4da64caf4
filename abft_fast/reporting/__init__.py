"""Show what runs left as one HTML page; nothing here needs torch."""
