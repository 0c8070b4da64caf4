"""What training did to attention: which heads changed, and which of them carry the gain."""
