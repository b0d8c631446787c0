"""What a person sees of a run: metrics, trackers, alarms, responses, tables and curves."""
