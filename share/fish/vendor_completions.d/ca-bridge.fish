# Completion of ca-bridge for fish. System-wide: into /usr/share/fish/vendor_completions.d/ca-bridge.fish.
function __ca_bridge_complete
    set -l words (commandline -opc) (commandline -ct)
    command $words[1] complete -- $words[2..-1] 2>/dev/null
end
function __ca_bridge_has_none
    test -z "$(__ca_bridge_complete)"
end
complete -c ca-bridge -n __ca_bridge_has_none -F
complete -c ca-bridge -n 'not __ca_bridge_has_none' -f -a '(__ca_bridge_complete)'
