"""How fast a device is, how busy stages are, and what a schedule would bring."""
