"""A network from elsewhere, with no attack of ours before it: read it, look for a backdoor in it, and
save the cleaned one."""
