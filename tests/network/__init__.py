"""A network laboratory: several machines on one."""
