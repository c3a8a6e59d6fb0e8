"""The sections of the configuration, by the folder that reads them."""
