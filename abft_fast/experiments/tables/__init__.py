"""The paper's tables, made of what runs left."""
