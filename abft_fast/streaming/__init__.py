"""Train and test a model of any size block by block: each weight is read once a run."""
