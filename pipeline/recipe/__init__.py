"""What a recipe says: its schema, the sections of a stage, and how its YAML is loaded. Imports no torch."""
