"""One run or one comparison on the workers of a cluster, with the results of one process."""
