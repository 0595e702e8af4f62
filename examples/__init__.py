"""Programs that use fastfuse as a user would."""
