"""Who is who: keys, certificates and the signed member list."""
