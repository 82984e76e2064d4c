"""Many conversations on one device."""
