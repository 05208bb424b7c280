"""Small trained additions to a frozen trunk."""
