"""The database: engine and sessions, tables, the revision of the schema. Imports errors only."""
