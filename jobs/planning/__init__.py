"""What `coatnet plan` prints, draws and writes."""
