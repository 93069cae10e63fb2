"""The algebra of mixing: the contract of an exchange, combine rules, codecs and attacks."""
