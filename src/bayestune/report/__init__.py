"""Pictures and pages of results; each file needs packages of `bayestune[report]`, so import it by name."""
