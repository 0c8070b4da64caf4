"""Tables in the paper's form: collect the runs, lay them out, format them."""
