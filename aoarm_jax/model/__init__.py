"""The backbone, and the mechanisms that tell a row what to predict."""
