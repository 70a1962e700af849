"""Whether the tests notice: small defects, planted one at a time in a copy of the source."""
