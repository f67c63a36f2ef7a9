"""The burn-in of devices: one micro-batch computed again and again on each, whose bits must not differ."""
