"""A fleet that does not exist yet, as discrete events over the runtime's own policies."""
