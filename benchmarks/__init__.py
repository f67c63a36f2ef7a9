"""Speed and memory, as ratios measured in one run. Not tests: nothing here decides whether a change is right."""
