"""What range numbers take, and what range a floating format has."""
