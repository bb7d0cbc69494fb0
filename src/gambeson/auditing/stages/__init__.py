"""The stages of an audit, one file each, which run before the diagnostics."""
