"""What tests of several folders share: commands, ranks, recipes, inputs."""
