"""Load tests: a data set with controlled reuse, an open-loop driver on several nodes, a report."""
