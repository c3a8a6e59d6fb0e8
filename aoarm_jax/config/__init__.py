"""What a run is: fields, rules, mechanisms, variants."""
