"""The stages of an audit, a file each: what is measured, in order, before the diagnostics are asked."""
