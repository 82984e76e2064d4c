"""The wire: routes, protocols, limits."""
