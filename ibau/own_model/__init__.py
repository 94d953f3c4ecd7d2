"""A network from elsewhere: read it, look for a backdoor in it, and save the cleaned one."""
