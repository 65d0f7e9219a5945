module ca-bridge/judge

go 1.26.0
