"""`abliterate evaluate`: an edited model against its base model."""
