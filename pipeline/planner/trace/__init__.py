"""The operations of a computation, recorded without a GPU, and the memory that they hold."""
