"""Plans that are run before they are believed."""
