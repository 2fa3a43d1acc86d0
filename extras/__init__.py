"""What is needed to run the project, not to understand the method."""
