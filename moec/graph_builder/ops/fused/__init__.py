"""Ops that do what several others do, for engines that have one kernel or operator for it."""
