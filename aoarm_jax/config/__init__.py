"""The configuration: fields, rules, mechanisms, and variants."""
