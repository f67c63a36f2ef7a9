"""The ranks of a run: where they meet, how they exchange, and the devices that they compute on."""
