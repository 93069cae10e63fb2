# Throw-away identities for a trial: sh office.sh FOLDER SITE ...
# Makes an authority, a key and a certificate for every site, and the signed list, in FOLDER; nothing if they are there.
set -eu
keys=$1
shift
[ ! -e "$keys/members.json" ] || exit 0
rm -rf "$keys"/*  # what an office that was stopped left
peerlora identity new "$keys/authority" --as-authority "A trial"
peerlora members new "$keys/draft.json" --name trial
for site in "$@"; do
    peerlora identity new "$keys/$site" --site "$site"
    peerlora identity request "$keys/$site" --to "$keys/$site.csr"
    peerlora identity sign "$keys/$site.csr" --authority "$keys/authority" --to "$keys/$site/certificate.pem" --days 30
    cp "$keys/authority/trust.pem" "$keys/$site/trust.pem"
    peerlora members add "$keys/draft.json" --site "$site" --certificate "$keys/$site/certificate.pem" \
        --address "$site:${PORT:-7443}"
done
peerlora members sign "$keys/draft.json" --authority "$keys/authority" --days 30
mv "$keys/draft.json" "$keys/members.json"
