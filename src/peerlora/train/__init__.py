"""How clients learn between exchanges."""
