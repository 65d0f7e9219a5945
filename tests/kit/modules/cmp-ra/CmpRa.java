import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.io.Reader;
import java.math.BigInteger;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyPairGenerator;
import java.security.PrivateKey;
import java.security.SecureRandom;
import java.security.Security;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.Date;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.bouncycastle.asn1.ASN1Integer;
import org.bouncycastle.asn1.ASN1ObjectIdentifier;
import org.bouncycastle.asn1.ASN1OctetString;
import org.bouncycastle.asn1.ASN1Sequence;
import org.bouncycastle.asn1.ASN1UTF8String;
import org.bouncycastle.asn1.DERSequence;
import org.bouncycastle.asn1.cmp.*;
import org.bouncycastle.asn1.crmf.CertReqMessages;
import org.bouncycastle.asn1.crmf.CertTemplate;
import org.bouncycastle.asn1.crmf.OptionalValidity;
import org.bouncycastle.asn1.pkcs.CertificationRequest;
import org.bouncycastle.asn1.pkcs.PrivateKeyInfo;
import org.bouncycastle.asn1.x500.X500Name;
import org.bouncycastle.asn1.x509.*;
import org.bouncycastle.cert.X509CertificateHolder;
import org.bouncycastle.cert.X509v3CertificateBuilder;
import org.bouncycastle.cert.cmp.GeneralPKIMessage;
import org.bouncycastle.cert.cmp.ProtectedPKIMessage;
import org.bouncycastle.cert.cmp.ProtectedPKIMessageBuilder;
import org.bouncycastle.cert.crmf.CertificateRequestMessage;
import org.bouncycastle.cert.crmf.PKMACBuilder;
import org.bouncycastle.cert.crmf.jcajce.JcePKMACValuesCalculator;
import org.bouncycastle.cert.jcajce.JcaX509ExtensionUtils;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.openssl.PEMKeyPair;
import org.bouncycastle.openssl.PEMParser;
import org.bouncycastle.openssl.jcajce.JcaPEMKeyConverter;
import org.bouncycastle.operator.ContentSigner;
import org.bouncycastle.operator.ContentVerifierProvider;
import org.bouncycastle.operator.jcajce.JcaContentSignerBuilder;
import org.bouncycastle.operator.jcajce.JcaContentVerifierProviderBuilder;
import org.bouncycastle.pkcs.PKCS10CertificationRequest;

/**
 * A CMP registration authority (RFC 9810, RFC 9483) for tests: cmp-ra DIR, on a free port of loopback.
 *
 * <p>DIR holds ra.crt with its chain and ra.key (answers are signed with it), clients-ca.crt (of those that may sign
 * requests), secrets/REFERENCE (of those that have a shared secret), and a directory for each CA with ca.crt, ca.key
 * and, unless it is 30, the certificates' validity in the file `days`. A CA may be added while it runs.
 *
 * <p>POST /CA[/BEHAVIOUR]/.well-known/cmp[/p/PROFILE]; PROFILE is server, client or peer, and without one the extended
 * key usages are those of the request's template. Without BEHAVIOUR it does what the RFCs say, and refuses a request
 * that does not; each behaviour departs from that in one way, see `Behaviour`.
 */
public final class CmpRa {
    /** What it does otherwise than it should; the name in small letters is the one in the URL. */
    enum Behaviour {
        OK,
        /** Grants no implicit confirmation. */ EXPLICIT,
        /** Answers "waiting" until the CA's directory has a file `approved`, or `refused` with the reason. */ WAIT,
        /** The same, and wants to be asked again in an hour. */ WAITLONG,
        /** Answers "waiting", and then knows nothing of it. */ FORGET,
        REJECT,
        /** The same in a message without protection. */ RAWREJECT,
        /** A rejection with a text that has line ends, words of the client's own, and what steers a terminal. */ LOUD,
        /** A rejection with a text of 20 kB. */ LONG,
        /** An error message: closed for maintenance. */ ERROR,
        /** The same without protection. */ RAWERROR,
        /** A certificate in a message without protection. */ RAW,
        /** Granted with modifications. */ MODS,
        /** Granted, without a certificate. */ NOCERT,
        WRONGKEY, WRONGSUBJECT, WRONGUSAGE,
        /** The protection is by another key or secret. */ BADMAC,
        /** Another recipNonce, transaction or version than the request's. */ NONCE, TID, OLDVERSION,
        /** Its clock is a day off. */ SKEW,
        /** Leaves out its own certificates. */ CHAINLESS,
        /** An error instead of the confirmation's answer. */ NOCONF,
        /** The program ends when it is asked to confirm. */ DIES,
        /** Knows no general messages. */ NOGENM;

        boolean explicit() { return this == EXPLICIT || this == NOCONF || this == DIES; }
        boolean waits() { return this == WAIT || this == WAITLONG || this == FORGET; }
        boolean unprotected() { return name().startsWith("RAW"); }
    }

    static final Map<String, KeyPurposeId[]> PROFILES = Map.of(
        "server", new KeyPurposeId[] {KeyPurposeId.id_kp_serverAuth},
        "client", new KeyPurposeId[] {KeyPurposeId.id_kp_clientAuth},
        "peer", new KeyPurposeId[] {KeyPurposeId.id_kp_serverAuth, KeyPurposeId.id_kp_clientAuth});
    static final Pattern PATH = Pattern.compile("/([\\w-]+)(?:/(\\w+))?/\\.well-known/cmp(?:/p/([\\w-]+))?");
    static final ASN1ObjectIdentifier CERT_PROFILE = new ASN1ObjectIdentifier("1.3.6.1.5.5.7.4.21");

    /** A request's place: which CA, how, with which profile. */
    record Place(Path directory, Behaviour behaviour, String profile) {}

    /** The sender of a request: a reference or a subject; or why it has no valid one. */
    record Who(String name, String wrong) {}

    final Map<String, PKIBody> waiting = new ConcurrentHashMap<>();
    final Set<BigInteger> issued = ConcurrentHashMap.newKeySet(), revoked = ConcurrentHashMap.newKeySet();
    final SecureRandom random = new SecureRandom();
    final Path directory;
    final X509CertificateHolder clientsCa;
    final List<X509CertificateHolder> chain;
    final PrivateKey key;

    CmpRa(Path directory) throws Exception {
        this.directory = directory;
        clientsCa = certificates(directory.resolve("clients-ca.crt")).get(0);
        chain = certificates(directory.resolve("ra.crt"));
        key = key(directory.resolve("ra.key"));
    }

    public static void main(String[] args) throws Exception {
        Security.addProvider(new BouncyCastleProvider());
        CmpRa ra = new CmpRa(Path.of(args[0]));
        int port = args.length > 1 ? Integer.parseInt(args[1]) : 0;
        HttpServer server = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), port), 0);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/", ra::serve);
        server.start();
        System.out.println("listening on " + server.getAddress().getPort());
    }

    void serve(HttpExchange http) {
        try (http) {
            byte[] in = http.getRequestBody().readAllBytes();
            Place place = place(http.getRequestURI().getPath());
            String type = http.getRequestHeaders().getFirst("Content-Type");
            if (place == null || !http.getRequestMethod().equals("POST") || !"application/pkixcmp".equals(type)) {
                reply(http, 404, "text/plain", "no such alias or profile\n".getBytes());
            } else {
                reply(http, 200, "application/pkixcmp", answer(new GeneralPKIMessage(in), place).getEncoded());
            }
        } catch (Exception e) {
            e.printStackTrace();
        }
    }

    Place place(String path) {
        Matcher parts = PATH.matcher(path);
        if (!parts.matches()) return null;
        String profile = parts.group(3);
        if (profile != null && !PROFILES.containsKey(profile)) return null;
        Path ca = directory.resolve(parts.group(1));
        if (!Files.exists(ca.resolve("ca.key"))) return null;
        String behaviour = parts.group(2);
        return new Place(ca, behaviour == null ? Behaviour.OK : Behaviour.valueOf(behaviour.toUpperCase()), profile);
    }

    static void reply(HttpExchange http, int status, String type, byte[] body) throws IOException {
        http.getResponseHeaders().set("Content-Type", type);
        http.sendResponseHeaders(status, body.length);
        http.getResponseBody().write(body);
    }

    PKIMessage answer(GeneralPKIMessage in, Place place) throws Exception {
        PKIHeader header = in.getHeader();
        Who who = authenticate(in);
        String wrong = who.wrong == null ? wrong(header, in.getBody()) : who.wrong;
        System.out.printf("request ca=%s behaviour=%s profile=%s type=%d by=%s tid=%s wrong=%s%n",
            place.directory.getFileName(), place.behaviour.name().toLowerCase(), place.profile, in.getBody().getType(),
            who.name == null ? "nobody" : who.name.replace(" ", "_"), header.getTransactionID(), wrong);
        System.out.flush();
        PKIBody out;
        if (who.wrong != null) out = error(who.wrong, PKIFailureInfo.badMessageCheck);
        else if (wrong != null) out = error(wrong, PKIFailureInfo.badRequest);
        else out = body(in.getBody(), header, place);
        boolean mac = who.wrong == null && new ProtectedPKIMessage(in).hasPasswordBasedMacProtection();
        return message(header, mac ? who.name : null, out, place.behaviour);
    }

    /** What RFC 9483 §3.1 wants of each request's header, as far as it is a client's choice. */
    static String wrong(PKIHeader header, PKIBody body) {
        if (header.getPvno().intValueExact() < PKIHeader.CMP_2000) return "version " + header.getPvno();
        if (header.getTransactionID() == null || header.getTransactionID().getOctetsLength() < 16) return "transactionID";
        if (header.getSenderNonce() == null || header.getSenderNonce().getOctetsLength() < 16) return "senderNonce";
        if (isEnrolment(body) && info(header, CMPObjectIdentifiers.it_implicitConfirm) == null) return "no implicitConfirm";
        return null;
    }

    static boolean isEnrolment(PKIBody body) {
        return body.getType() == PKIBody.TYPE_P10_CERT_REQ || body.getType() == PKIBody.TYPE_CERT_REQ;
    }

    static InfoTypeAndValue info(PKIHeader header, ASN1ObjectIdentifier type) {
        if (header.getGeneralInfo() == null) return null;
        for (InfoTypeAndValue one : header.getGeneralInfo()) if (one.getInfoType().equals(type)) return one;
        return null;
    }

    Who authenticate(GeneralPKIMessage in) throws Exception {
        if (!in.hasProtection()) return new Who(null, "no protection");
        ProtectedPKIMessage message = new ProtectedPKIMessage(in);
        if (message.hasPasswordBasedMacProtection()) {
            ASN1OctetString reference = in.getHeader().getSenderKID();
            char[] secret = reference == null ? null : secret(new String(reference.getOctets()));
            if (secret == null) return new Who(null, "unknown reference");
            boolean right = message.verify(new PKMACBuilder(new JcePKMACValuesCalculator(), 100_000), secret);
            return right ? new Who(new String(reference.getOctets()), null) : new Who(null, "wrong protection");
        }
        X509CertificateHolder[] certificates = message.getCertificates();
        if (certificates.length == 0 || !certificates[0].isSignatureValid(verifier(clientsCa.getSubjectPublicKeyInfo()))) {
            return new Who(null, "signer not trusted");
        }
        boolean right = message.verify(verifier(certificates[0].getSubjectPublicKeyInfo()));
        return right ? new Who(certificates[0].getSubject().toString(), null) : new Who(null, "wrong protection");
    }

    char[] secret(String reference) throws IOException {
        Path file = directory.resolve("secrets").resolve(reference.replace("/", "_"));
        return Files.exists(file) ? Files.readString(file).strip().toCharArray() : null;
    }

    PKIBody body(PKIBody in, PKIHeader header, Place place) throws Exception {
        String transaction = header.getTransactionID().toString();
        if (place.behaviour == Behaviour.ERROR || place.behaviour == Behaviour.RAWERROR) {
            return error("the RA is closed for maintenance", PKIFailureInfo.systemUnavail);
        }
        return switch (in.getType()) {
            case PKIBody.TYPE_P10_CERT_REQ, PKIBody.TYPE_CERT_REQ -> enrol(in, header, place);
            case PKIBody.TYPE_POLL_REQ -> poll(transaction, PollReqContent.getInstance(in.getContent()), place);
            case PKIBody.TYPE_CERT_CONFIRM -> confirm(CertConfirmContent.getInstance(in.getContent()), place.behaviour);
            case PKIBody.TYPE_REVOCATION_REQ -> revoke(RevReqContent.getInstance(in.getContent()), place);
            case PKIBody.TYPE_GEN_MSG -> place.behaviour == Behaviour.NOGENM
                ? error("unsupported body", PKIFailureInfo.badRequest)
                : new PKIBody(PKIBody.TYPE_GEN_REP, GenMsgContent.getInstance(in.getContent()));
            default -> error("unsupported body", PKIFailureInfo.badRequest);
        };
    }

    PKIBody confirm(CertConfirmContent content, Behaviour behaviour) {
        if (behaviour == Behaviour.DIES) Runtime.getRuntime().halt(1);
        PKIStatusInfo status = content.toCertStatusArray()[0].getStatusInfo();
        boolean accepted = status == null || status.getStatus().intValue() == PKIStatus.GRANTED;
        System.out.println("confirmation " + (accepted ? "accepted" : "refused"));
        System.out.flush();
        return behaviour == Behaviour.NOCONF
            ? error("confirmed too late", PKIFailureInfo.certConfirmed)
            : new PKIBody(PKIBody.TYPE_CONFIRM, new PKIConfirmContent());
    }

    PKIBody enrol(PKIBody in, PKIHeader header, Place place) throws Exception {
        boolean pkcs10 = in.getType() == PKIBody.TYPE_P10_CERT_REQ;
        ASN1Integer id = new ASN1Integer(pkcs10 ? -1 : 0);
        if (place.behaviour == Behaviour.REJECT || place.behaviour == Behaviour.RAWREJECT) {
            return rep(id, rejection("names not registered for this node", PKIFailureInfo.notAuthorized), null);
        }
        if (place.behaviour == Behaviour.LOUD || place.behaviour == Behaviour.LONG) {
            String text = place.behaviour == Behaviour.LONG ? "x".repeat(20_000) : "\u001b[2Jno\nCMP error: transfer error\n";
            return rep(id, rejection(text, PKIFailureInfo.notAuthorized), null);
        }
        Wanted wanted = wanted(in);
        if (wanted == null) return error("bad proof of possession", PKIFailureInfo.badPOP);
        if (place.behaviour.waits()) {
            // signed when it is approved: who is not asked again has issued nothing
            waiting.put(header.getTransactionID().toString(), new PKIBody(in.getType(), in.getContent()));
            return rep(id, new PKIStatusInfo(PKIStatus.waiting, new PKIFreeText("an officer has to approve")), null);
        }
        return granted(id, wanted, header, place);
    }

    PKIBody granted(ASN1Integer id, Wanted wanted, PKIHeader header, Place place) throws Exception {
        X509CertificateHolder leaf = sign(wanted, header, place);
        PKIStatusInfo status = place.behaviour == Behaviour.MODS
            ? new PKIStatusInfo(PKIStatus.grantedWithMods, new PKIFreeText("validity shortened"))
            : new PKIStatusInfo(PKIStatus.granted);
        return rep(id, status, place.behaviour == Behaviour.NOCERT ? null : leaf);
    }

    PKIBody poll(String transaction, PollReqContent request, Place place) throws Exception {
        PKIBody order = place.behaviour == Behaviour.FORGET ? null : waiting.get(transaction);
        if (order == null) return error("no such transaction", PKIFailureInfo.badRequest);
        ASN1Integer id = request.getCertReqIds()[0][0];
        Path refused = place.directory.resolve("refused");
        if (Files.exists(refused)) {
            return rep(id, rejection(Files.readString(refused).strip(), PKIFailureInfo.notAuthorized), null);
        }
        if (!Files.exists(place.directory.resolve("approved"))) {
            ASN1Integer checkAfter = new ASN1Integer(place.behaviour == Behaviour.WAITLONG ? 3600 : 1);
            PKIFreeText reason = new PKIFreeText("not approved yet");
            return new PKIBody(PKIBody.TYPE_POLL_REP, new PollRepContent(id, checkAfter, reason));
        }
        waiting.remove(transaction);
        return granted(id, wanted(order), null, place);
    }

    PKIBody revoke(RevReqContent content, Place place) {
        CertTemplate one = content.toRevDetailsArray()[0].getCertDetails();
        BigInteger serial = one.getSerialNumber().getValue();
        Extensions details = content.toRevDetailsArray()[0].getCrlEntryDetails();
        System.out.printf("revocation serial=%s reason=%s%n", serial,
            CRLReason.getInstance(details.getExtensionParsedValue(Extension.reasonCode)).getValue());
        System.out.flush();
        PKIStatusInfo status = new PKIStatusInfo(PKIStatus.granted);
        if (place.behaviour == Behaviour.REJECT) status = rejection("not by this client", PKIFailureInfo.notAuthorized);
        else if (!issued.contains(serial)) status = rejection("unknown certificate", PKIFailureInfo.badCertId);
        else if (!revoked.add(serial)) status = rejection("revoked already", PKIFailureInfo.certRevoked);
        return new PKIBody(PKIBody.TYPE_REVOCATION_REP, new RevRepContentBuilder().add(status).build());
    }

    /** What a certificate is asked for. */
    record Wanted(X500Name subject, SubjectPublicKeyInfo key, Extensions extensions, Date notAfter) {}

    static Wanted wanted(PKIBody body) throws Exception {
        return body.getType() == PKIBody.TYPE_P10_CERT_REQ
            ? wanted(new PKCS10CertificationRequest(CertificationRequest.getInstance(body.getContent())))
            : wanted(CertReqMessages.getInstance(body.getContent()));
    }

    /** Null: its holder has not proved to hold the key. */
    static Wanted wanted(PKCS10CertificationRequest csr) throws Exception {
        if (!csr.isSignatureValid(verifier(csr.getSubjectPublicKeyInfo()))) return null;
        return new Wanted(csr.getSubject(), csr.getSubjectPublicKeyInfo(), csr.getRequestedExtensions(), null);
    }

    /** The same; that an RA has verified it is proof enough (RFC 4211 §4). */
    static Wanted wanted(CertReqMessages messages) {
        CertificateRequestMessage request = new CertificateRequestMessage(messages.toCertReqMsgArray()[0]);
        if (request.getProofOfPossessionType() != CertificateRequestMessage.popRaVerified) return null;
        CertTemplate template = request.getCertTemplate();
        OptionalValidity validity = template.getValidity();
        Date notAfter = validity == null || validity.getNotAfter() == null ? null : validity.getNotAfter().getDate();
        return new Wanted(template.getSubject(), template.getPublicKey(), template.getExtensions(), notAfter);
    }

    X509CertificateHolder sign(Wanted wanted, PKIHeader header, Place place) throws Exception {
        X509CertificateHolder ca = certificates(place.directory.resolve("ca.crt")).get(0);
        SubjectPublicKeyInfo publicKey = place.behaviour == Behaviour.WRONGKEY ? anotherKey() : wanted.key;
        X500Name subject = place.behaviour == Behaviour.WRONGSUBJECT ? new X500Name("CN=somebody-else") : wanted.subject;
        Instant now = Instant.now();
        Path days = place.directory.resolve("days");
        Duration validity = Duration.ofDays(Files.exists(days) ? Long.parseLong(Files.readString(days).strip()) : 30);
        Date end = wanted.notAfter == null ? Date.from(now.plus(validity)) : wanted.notAfter;
        X509v3CertificateBuilder builder = new X509v3CertificateBuilder(ca.getSubject(), new BigInteger(127, random),
            Date.from(now.minusSeconds(60)), end, subject, publicKey);
        JcaX509ExtensionUtils identifiers = new JcaX509ExtensionUtils();
        builder.addExtension(Extension.basicConstraints, true, new BasicConstraints(false));
        builder.addExtension(Extension.keyUsage, true, new KeyUsage(KeyUsage.digitalSignature | KeyUsage.keyEncipherment));
        builder.addExtension(Extension.authorityKeyIdentifier, false, identifiers.createAuthorityKeyIdentifier(ca));
        String profile = place.behaviour == Behaviour.WRONGUSAGE ? "peer" : profile(place, header);
        if (profile != null) {
            builder.addExtension(Extension.extendedKeyUsage, false, new ExtendedKeyUsage(PROFILES.get(profile)));
        } else copy(wanted.extensions, Extension.extendedKeyUsage, builder);
        copy(wanted.extensions, Extension.subjectAlternativeName, builder);
        X509CertificateHolder leaf = builder.build(signer(key(place.directory.resolve("ca.key"))));
        issued.add(leaf.getSerialNumber());
        return leaf;
    }

    /** The path's, or else the one that the header names (RFC 9483 §4.1.1 with id-it-certProfile). */
    static String profile(Place place, PKIHeader header) {
        if (place.profile != null || header == null) return place.profile;
        InfoTypeAndValue named = info(header, CERT_PROFILE);
        if (named == null) return null;
        return ASN1UTF8String.getInstance(ASN1Sequence.getInstance(named.getInfoValue()).getObjectAt(0)).getString();
    }

    static void copy(Extensions from, ASN1ObjectIdentifier type, X509v3CertificateBuilder to) throws IOException {
        if (from != null && from.getExtension(type) != null) to.addExtension(from.getExtension(type));
    }

    static SubjectPublicKeyInfo anotherKey() throws Exception {
        return SubjectPublicKeyInfo.getInstance(KeyPairGenerator.getInstance("EC").generateKeyPair().getPublic().getEncoded());
    }

    /** The protected message; reference null: signed. */
    PKIMessage message(PKIHeader to, String reference, PKIBody body, Behaviour behaviour) throws Exception {
        byte[] transaction = to.getTransactionID().getOctets().clone();
        byte[] nonce = to.getSenderNonce().getOctets().clone();
        if (behaviour == Behaviour.TID) transaction[0] ^= 1;
        if (behaviour == Behaviour.NONCE) nonce[0] ^= 1;
        X500Name nobody = X500Name.getInstance(new DERSequence());
        GeneralName sender = new GeneralName(reference != null ? nobody : chain.get(0).getSubject());
        int version = behaviour == Behaviour.OLDVERSION ? PKIHeader.CMP_1999 : to.getPvno().intValueExact();
        Date time = Date.from(Instant.now().plus(behaviour == Behaviour.SKEW ? Duration.ofDays(1) : Duration.ZERO));
        if (behaviour.unprotected()) {
            return new PKIMessage(new PKIHeaderBuilder(version, sender, to.getSender()).setTransactionID(transaction)
                .setRecipNonce(nonce).setSenderNonce(nonce()).build(), body);
        }
        ProtectedPKIMessageBuilder builder = new ProtectedPKIMessageBuilder(version, sender, to.getSender())
            .setTransactionID(transaction).setRecipNonce(nonce).setSenderNonce(nonce()).setMessageTime(time).setBody(body);
        InfoTypeAndValue implicit = info(to, CMPObjectIdentifiers.it_implicitConfirm);
        if (implicit != null && !behaviour.explicit()) builder.addGeneralInfo(implicit);
        if (behaviour != Behaviour.CHAINLESS) chain.forEach(builder::addCMPCertificate);
        if (reference == null) {
            boolean bad = behaviour == Behaviour.BADMAC;
            PrivateKey other = bad ? KeyPairGenerator.getInstance("EC").generateKeyPair().getPrivate() : key;
            return builder.build(signer(other)).toASN1Structure();
        }
        builder.setSenderKID(reference.getBytes());
        char[] secret = behaviour == Behaviour.BADMAC ? "another one".toCharArray() : secret(reference);
        return builder.build(new PKMACBuilder(new JcePKMACValuesCalculator()).build(secret)).toASN1Structure();
    }

    byte[] nonce() {
        byte[] bytes = new byte[16];
        random.nextBytes(bytes);
        return bytes;
    }

    static PKIBody rep(ASN1Integer id, PKIStatusInfo status, X509CertificateHolder leaf) {
        CertifiedKeyPair pair = leaf == null
            ? null
            : new CertifiedKeyPair(new CertOrEncCert(new CMPCertificate(leaf.toASN1Structure())));
        CertResponse[] responses = {new CertResponse(id, status, pair, null)};
        return new PKIBody(PKIBody.TYPE_CERT_REP, new CertRepMessage(null, responses));
    }

    static PKIStatusInfo rejection(String text, int failure) {
        return new PKIStatusInfo(PKIStatus.rejection, new PKIFreeText(text), new PKIFailureInfo(failure));
    }

    static PKIBody error(String text, int failure) {
        PKIFreeText details = new PKIFreeText("see the log");
        return new PKIBody(PKIBody.TYPE_ERROR, new ErrorMsgContent(rejection(text, failure), new ASN1Integer(7), details));
    }

    static ContentVerifierProvider verifier(SubjectPublicKeyInfo key) throws Exception {
        return new JcaContentVerifierProviderBuilder().build(key);
    }

    static ContentSigner signer(PrivateKey key) throws Exception {
        String algorithm = key.getAlgorithm().startsWith("EC") ? "SHA256withECDSA" : "SHA256withRSA";
        return new JcaContentSignerBuilder(algorithm).build(key);
    }

    static List<X509CertificateHolder> certificates(Path file) throws IOException {
        List<X509CertificateHolder> found = new ArrayList<>();
        try (Reader text = Files.newBufferedReader(file); PEMParser parser = new PEMParser(text)) {
            for (Object one; (one = parser.readObject()) != null; ) found.add((X509CertificateHolder) one);
        }
        return found;
    }

    static PrivateKey key(Path file) throws IOException {
        try (Reader text = Files.newBufferedReader(file); PEMParser parser = new PEMParser(text)) {
            Object one = parser.readObject();
            PrivateKeyInfo info = one instanceof PEMKeyPair pair ? pair.getPrivateKeyInfo() : (PrivateKeyInfo) one;
            return new JcaPEMKeyConverter().getPrivateKey(info);
        }
    }
}
