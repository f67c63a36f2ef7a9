"""What can be found out about a stage before it runs: on the machine at hand, and on the nodes as its ranks."""
