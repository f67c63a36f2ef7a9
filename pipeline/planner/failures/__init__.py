"""What failures cost a run: one of them, all of a month, and how often to save because of them."""
