"""A cluster of several hosts on one machine: network namespaces with Ray in each, the application across them."""
