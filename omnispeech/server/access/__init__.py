"""Who may come in, and how much one may ask for."""
