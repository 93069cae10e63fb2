"""Identities of sites: keys, certificates and the signed member list."""
