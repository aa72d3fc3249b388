"""The backend: from the graph of Dynamo to compiled code, and what is remembered of each graph."""
