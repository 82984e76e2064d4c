"""What has been said and done in a conversation, and what of it the model reads."""
