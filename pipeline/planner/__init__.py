"""What a stage will cost before it runs: its operations, their time on a GPU, and its memory."""
