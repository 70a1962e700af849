"""Pictures and pages of results. Each file needs a package of `bayestune[report]`, so import it by name."""
