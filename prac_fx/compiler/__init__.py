"""The backend: from the graph of Dynamo to compiled code, in two phases, and what is remembered of each graph."""
